//! Saved states with a wrong number and a right checksum: what a checksum alone would keep from the code behind it.

/// The state with its last eight bytes replaced by the checksum of an estimator's state: FNV-1a, little endian.
pub fn estimator(mut state: Vec<u8>) -> Vec<u8> {
    let body = state.len().saturating_sub(8);
    let fold = |hash: u64, &byte: &u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    let sum = state[..body].iter().fold(0xcbf2_9ce4_8422_2325, fold);
    state.truncate(body);
    state.extend(sum.to_le_bytes());
    state
}

/// The same for the state of a queue or of an optimiser: FNV-1a over words, in the machine's byte order.
pub fn queue(mut state: Vec<u8>) -> Vec<u8> {
    let body = state.len().saturating_sub(8);
    let fold = |sum: u64, chunk: &[u8]| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        (sum ^ u64::from_ne_bytes(word)).wrapping_mul(0x100_0000_01b3).rotate_left(23)
    };
    let sum = state[..body].chunks(8).fold(0xcbf2_9ce4_8422_2325 ^ body as u64, fold);
    state.truncate(body);
    state.extend(sum.to_ne_bytes());
    state
}

/// The state with eight bytes at `at` replaced, to be given a checksum.
pub fn with(state: &[u8], at: usize, number: [u8; 8]) -> Vec<u8> {
    let mut state = state.to_vec();
    state[at..at + 8].copy_from_slice(&number);
    state
}
