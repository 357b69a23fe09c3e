"""Changes of dense weights as changes of lookup tables, and back as adapters and dense models."""
