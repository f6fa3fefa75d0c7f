"""Runtimes that a profile can measure, one file each: how a bundle becomes what they open.

- `ENGINE`: the file of device_side/engines that drives it there;
- `INSTALL`: the command that installs it, for messages;
- `BESIDE` (none where it is left out): folders of device_side that its engine imports from, sent along;
- `OPERATORS` (its own where it is left out): the runtime that times operators in its place;
- `require(device)` raises a `ProfileError` where it cannot run: for this machine all that can be known before a model
  is opened, for another one what preparing needs here;
- `prepare(bundle, device, folder, shapes)` writes what it opens below `folder/model`, and returns `job.Models`;
- `made_for(device, shapes)` (only where `prepare` makes other files than the bundle's) says in JSON's types what these
  files depend on, beside the bundle.

A runtime that is no Python program has `measure(folder, transport, timeout_s, what)` too, which runs one measurement
and returns its samples, and `KINDS`, what it can measure beside "speed".
"""
