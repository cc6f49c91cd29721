"""What a report measures: every metric by itself, with its name, unit, direction and source."""
