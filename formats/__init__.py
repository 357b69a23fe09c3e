"""Bytes on disk: the `.sktch` container, its packing and metadata. Needs only numpy."""
