"""Images and videos: in files, in colours, in windows, drawn."""
