//! Whole-system tests live in the folders beside this one; see README.md.
