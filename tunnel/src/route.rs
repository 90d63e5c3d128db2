//! Which way a target goes: a direct node, an edge node by name or address, the pods of a node,
//! a direct CIDR, or a refusal that says why. Pure: a snapshot of nodes and a target in, a route out.
