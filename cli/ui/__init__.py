"""Options, tables and progress that commands share."""
