//! Memory of a size that comes from outside: from an argument, or from bytes that are read.
//!
//! If it cannot be allocated, the caller gets `None` and returns a typed error, in place of an abort. Memory that was
//! allocated is not touched before it is used.

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
