# Fails if an object compiled for an instruction set (OBJECT, ISA; read with NM) holds code that a machine without it
# could run. The linker keeps one copy of an inline function or of a template's instance, and may keep this object's;
# initialisers of globals run on every machine. So both must be in a namespace of the instruction set's name, or not
# be there: instances for the file's own types, functions in an unnamed namespace, and constexpr globals are harmless.
execute_process(COMMAND "${NM}" -P "${OBJECT}" OUTPUT_VARIABLE listed RESULT_VARIABLE failed)
if(failed)
  message(FATAL_ERROR "${NM} cannot read ${OBJECT}")
endif()
string(LENGTH "${ISA}" length)
string(REGEX MATCHALL "[^\n]+" lines "${listed}")
set(wrong "")
foreach(line IN LISTS lines)
  if(line MATCHES "^([^ ]+) ([A-Za-z]) [0-9a-f]")
    set(name "${CMAKE_MATCH_1}")
    set(kind "${CMAKE_MATCH_2}")
    if(name MATCHES "^_GLOBAL__")
      list(APPEND wrong "${name} (initialises a global)")
    elseif(kind MATCHES "[WVu]" AND NOT name MATCHES "${length}${ISA}|^DW\\.ref\\.")
      list(APPEND wrong "${name}")
    endif()
  endif()
endforeach()
if(wrong)
  list(JOIN wrong "\n  " wrong)
  message(FATAL_ERROR
    "isa_${ISA}.cpp defines what machines without ${ISA} could run; move it into namespace ${ISA} or another file:\n"
    "  ${wrong}")
endif()
