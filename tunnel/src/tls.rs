//! Who is at the other end, and who we are: identities read from certificates, a verifier per
//! listener, and certificate files that are followed while streams go on.
