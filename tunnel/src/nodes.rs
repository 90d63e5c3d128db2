//! The nodes the server knows: a snapshot with indexes by name, address and pod network, kept up to
//! date from the API server or from a file.
