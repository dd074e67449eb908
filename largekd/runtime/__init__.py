"""Runtime: this process, its peers, and how a run starts, stops and notices a hung rank."""
