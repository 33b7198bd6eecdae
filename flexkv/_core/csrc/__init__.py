"""C declarations: one .pxd for each header of `csrc/`, with nothing else in it."""
