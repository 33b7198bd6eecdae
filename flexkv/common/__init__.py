"""Import paths of upstream FlexKV."""
