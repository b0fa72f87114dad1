"""One Luigi task per stage, the store that keeps their results, and the rules for what reruns."""
