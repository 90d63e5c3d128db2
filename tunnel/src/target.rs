//! What a caller asks for: the authority of a CONNECT, checked once and then carried as a type.
