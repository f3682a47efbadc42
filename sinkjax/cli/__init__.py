"""The command line: `sinkjax COMMAND`, one file per command, its flags the fields of a dataclass.

entry     commands, their parsing, and the one place that turns an error into a line
options   flags that several commands share
record    what stands beside every number that a command writes down

A command's module is imported when the command is named, so `sinkjax --help` is quick.
"""

from sinkjax.cli.entry import main as main
