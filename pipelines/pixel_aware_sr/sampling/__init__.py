"""The steps of a run, from the image given to the image returned."""
