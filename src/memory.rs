//! Memory whose size somebody else says: an argument, or bytes from outside.
//!
//! Where there is not enough of it the caller gets `None` for a typed error, in place of an abort. Where there is, it
//! is not touched before it is used.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, Hash};

use bytemuck::Zeroable;

/// `len` zeros, which the system provides as they are first written or read.
pub(crate) fn zeroed<T: Zeroable>(len: usize) -> Option<Vec<T>> {
    bytemuck::allocation::try_zeroed_vec(len).ok()
}

/// An empty collection with room for `len` elements.
pub(crate) fn reserved<C: Reserve>(len: usize) -> Option<C> {
    let mut collection = C::default();
    collection.try_reserve(len).ok()?;
    Some(collection)
}

/// What [`reserved`] makes.
pub(crate) trait Reserve: Default {
    fn try_reserve(&mut self, len: usize) -> Result<(), std::collections::TryReserveError>;
}

impl<T> Reserve for Vec<T> {
    fn try_reserve(&mut self, len: usize) -> Result<(), std::collections::TryReserveError> {
        self.try_reserve_exact(len)
    }
}

impl<T: Eq + Hash, S: BuildHasher + Default> Reserve for HashSet<T, S> {
    fn try_reserve(&mut self, len: usize) -> Result<(), std::collections::TryReserveError> {
        self.try_reserve(len)
    }
}

impl<K: Eq + Hash, V, S: BuildHasher + Default> Reserve for HashMap<K, V, S> {
    fn try_reserve(&mut self, len: usize) -> Result<(), std::collections::TryReserveError> {
        self.try_reserve(len)
    }
}
