"""What branches compute, one form in each file: `shapes` of what was trained, and `draw`, the nodes of a graph."""
