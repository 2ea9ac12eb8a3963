//! What is proved on real clusters: real processes, sockets, etcd and clients, with the demo model. One
//! test binary, so that it links once. Every scenario ends by asking each worker's block pool whether
//! anything is still held.

mod harness;
mod scenarios;
