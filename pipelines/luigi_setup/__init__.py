"""What Luigi's command needs besides: checked settings, whole options, a local scheduler, signals."""
