"""The command line: the only place that knows typer, rich and the terminal.

A command parses flags, makes one call to the library and shows the result. stdout carries results alone (JSON, the
text that a model wrote, listed names); tables, progress, warnings and errors go to stderr. Exit status: 0 done,
1 a known error, 2 wrong usage, 130 interrupted.
"""
