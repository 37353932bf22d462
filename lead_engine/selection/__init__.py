"""Who is trained next: a bandit over difficulty clusters, a ranking inside them, and the utility behind both."""
