//! A list that keeps its first elements in place: a step on one or two pools allocates nothing on the host.

/// The first `N` elements are where the list is, further ones on the heap.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Few<T, const N: usize> {
    near: [Option<T>; N],
    far: Vec<T>,
}

impl<T, const N: usize> Default for Few<T, N> {
    fn default() -> Self {
        Few { near: std::array::from_fn(|_| None), far: Vec::new() }
    }
}

impl<T, const N: usize> Few<T, N> {
    pub(super) fn push(&mut self, value: T) {
        match self.near.iter_mut().find(|place| place.is_none()) {
            Some(place) => *place = Some(value),
            None => self.far.push(value),
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &T> + Clone {
        self.near.iter().flatten().chain(&self.far)
    }

    pub(super) fn len(&self) -> usize {
        self.iter().count()
    }

    /// Takes all elements out, in order.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = T> {
        self.near.iter_mut().filter_map(Option::take).chain(self.far.drain(..))
    }
}

impl<T, const N: usize> std::ops::Index<usize> for Few<T, N> {
    type Output = T;

    fn index(&self, index: usize) -> &T {
        match self.near.get(index) {
            Some(Some(value)) => value,
            _ => &self.far[index - N],
        }
    }
}

impl<T, const N: usize> FromIterator<T> for Few<T, N> {
    fn from_iter<I: IntoIterator<Item = T>>(values: I) -> Self {
        let mut few = Few::default();
        values.into_iter().for_each(|value| few.push(value));
        few
    }
}

#[cfg(test)]
mod tests {
    use super::Few;

    #[test]
    fn elements_keep_their_order_wherever_they_are() {
        for len in 0..6 {
            let mut few: Few<usize, 3> = (0..len).collect();
            assert_eq!((few.len(), few.far.len()), (len, len.saturating_sub(3)));
            assert!(few.iter().copied().eq(0..len) && (0..len).all(|index| few[index] == index));
            assert!(few.drain().eq(0..len) && few.len() == 0);
        }
    }
}
