"""The executors: one for copies by the ranks' agents, one for stores."""
