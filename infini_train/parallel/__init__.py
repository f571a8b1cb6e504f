"""Process groups, collectives and engines; the only home of what differs between machines."""
