"""Task adapters at run time: many sets of LUTs over the indices of one loaded sketch."""
