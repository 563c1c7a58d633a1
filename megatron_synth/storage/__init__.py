"""Objects in buckets and on the web, by fsspec and the libraries that it knows: nothing else opens a path with a scheme."""
