"""The cache, the compiler of C++ text, and what runs a Program."""
