"""Files of unknown origin, read into bounded memory; lock files; errors of disks."""
