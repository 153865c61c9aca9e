"""A student beside its teacher: figures, pictures, and the page that shows them."""
