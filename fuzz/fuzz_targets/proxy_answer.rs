//! libFuzzer's way into [`fuzz::proxy_answer`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::proxy_answer(data));
