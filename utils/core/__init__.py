"""What everything else stands on: one-line errors, the argument parser, keyed random generators."""
