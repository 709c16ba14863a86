"""Options, tables, messages and progress displays that commands share."""
