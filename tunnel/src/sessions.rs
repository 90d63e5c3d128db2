//! Who is connected: the registry of agents' sessions, newest wins, with their extra connections.
