//! Copies bytes both ways between a socket and a stream: half-close and reset carried over, large
//! buffers while there is work and none while there is not.
