"""The steps of a run, from the picture given to the picture returned."""
