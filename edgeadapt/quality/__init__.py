"""A session's outputs against the original's in torch: parity of the export, quality after quantizing, the gate."""
