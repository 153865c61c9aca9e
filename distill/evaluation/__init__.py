"""A student beside its teacher: figures, images, and the page that shows them."""
