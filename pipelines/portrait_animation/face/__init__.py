"""Faces in frames: found, aligned, cut out, put back, and drawn as control images."""
