"""Plans of runs on TPUs that are not there: compiled ahead of time, measured on paper."""
