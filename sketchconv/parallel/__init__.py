"""One conversion by several processes: tensors are shared out, one process keeps the books."""
