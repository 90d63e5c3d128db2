//! The agent's last word: which addresses and ports may be dialled on this node (`--allow`), and
//! the addresses that are refused whatever is allowed. Pure.
