//! Whole-system tests, one folder a subject; see README.md. There is no code here.
