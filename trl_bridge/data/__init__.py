"""Training data: generated tasks that need no download, and loading of local files and hub datasets."""
