"""Many runs compared: which runs a study has, starting them, paired statistics, tables."""
