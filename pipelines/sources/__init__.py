"""Sources of pictures; what a command line names of them without loading one."""

HELDOUT_STYLE = "twemoji"  # draws every concept, and is there without any file
