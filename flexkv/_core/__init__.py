"""Native code (Cython); what is not in a folder is used by several of them."""
