"""One file per library whose adapter folders are read: `holds` and `read`.

`holds(folder) -> bool`: whether the folder has an adapter of this layout; the first by name whose `holds` is true reads
it. `read(name, folder, root) -> Adapter`: the adapter, checked as far as is possible without its base.
`fit(adapter, modules, head_dim) -> Adapter`, where files name or order things otherwise than the base: the same in its
terms, given the base's modules and the size of its attention heads (None where it has none).
"""
