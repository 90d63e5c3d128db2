//! libFuzzer's way into [`fuzz::proxy_request`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::proxy_request(data));
