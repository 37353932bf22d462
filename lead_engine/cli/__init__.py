"""The command line.

    command_line.py  entry: finds the command, turns errors into messages and exit statuses
    commands.py      the table of commands: options and function of each
    flags.py         reading options: flags over a YAML file over defaults
    compare.py, doctor.py   two commands that have no room of their own

YAML files are read in config (from_yaml.py, yaml_file.py), since run folders and studies are YAML too; what is printed
while a command runs goes through base/console.py, which every room uses.
"""

from lead_engine.cli.command_line import main

__all__ = ["main"]
