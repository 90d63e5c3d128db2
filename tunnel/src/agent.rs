//! `edge-tunnel agent`: dials the server, keeps its session, and dials on the node what the server
//! asks for and the allow-list permits.
