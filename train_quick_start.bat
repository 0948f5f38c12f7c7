@echo off
rem From a fresh clone to a trained model, in two steps: environment, then one training command.
rem train_quick_start.sh does the same, step for step, on Linux and macOS.
setlocal
set "root=%~dp0"
set "venv_python=%root%.venv\Scripts\python.exe"

set "mode=%~1"
rem All arguments as they were typed; cmd splits single ones at commas, as in --classes a,b.
set "rest=%*"
if "%mode%"=="" goto sample
if "%mode%"=="-h" goto help
if "%mode%"=="--help" goto help
if "%mode%"=="help" goto help
if "%mode%"=="setup" goto setup_only
if "%mode%"=="food101" goto food101
if "%mode:~0,1%"=="-" goto flags
call :usage 1>&2
exit /b 2

:help
call :usage
if exist "%venv_python%" "%venv_python%" "%root%backend\train_model.py" --help
exit /b

:setup_only
call :setup || exit /b 1
if not "%~2"=="" call :install "%~2" || exit /b 1
exit /b 0

:food101
call :setup || exit /b 1
set "rest=%rest:*food101=%"
"%venv_python%" "%root%backend\train_model.py" --epochs 20 --model_name mobilenet_v2 %rest%
exit /b

:sample
call :setup || exit /b 1
"%venv_python%" "%root%backend\train_model.py" --sample --model_name efficientnet_lite0 --epochs 8 || exit /b
call :show_next
exit /b

:flags
call :setup || exit /b 1
"%venv_python%" "%root%backend\train_model.py" --sample --model_name efficientnet_lite0 --epochs 8 %rest%
exit /b

:usage
echo train_quick_start.bat               train on drawn sample plates: minutes, nothing to download
echo train_quick_start.bat food101       train MobileNetV2 on Food-101 for 20 epochs (5 GB download)
echo train_quick_start.bat setup [FILE]  only make .venv and install (also what FILE lists)
echo.
echo Any flag of backend\train_model.py may follow the first two, for example --epochs 3.
exit /b 0

:setup
call :make_environment || exit /b 1
call :install backend\requirements.txt || exit /b 1
exit /b 0

:suits
%* -c "import sys; sys.exit(sys.version_info < (3, 10))" >nul 2>&1
exit /b

:find_python
set "base="
if defined PYTHON (
  call :suits "%PYTHON%" && set base="%PYTHON%"
  exit /b 0
)
call :suits py -3 && set "base=py -3" && exit /b 0
call :suits python && set "base=python"
exit /b 0

:make_environment
if exist "%root%.venv" (
  call :suits "%venv_python%" && "%venv_python%" -c "import pip" && exit /b 0
  echo train_quick_start: "%root%.venv" has no working Python 3.10 or newer with pip; delete it and try again 1>&2
  exit /b 1
)
call :find_python
if not defined base (
  echo train_quick_start: Python 3.10 or newer is needed; get one from python.org, with its launcher py 1>&2
  exit /b 1
)
echo making .venv
%base% -m venv "%root%.venv" && exit /b 0
rmdir /s /q "%root%.venv" 2>nul
echo train_quick_start: the environment could not be made; reinstall Python from python.org with pip 1>&2
exit /b 1

:install
set "list=%~1"
set "list=%list:/=\%"
set "stamp=%root%.venv\installed-%list:\=-%"
fc /b "%root%%list%" "%stamp%" >nul 2>&1 && exit /b 0
if not exist "%root%%list%" (
  echo train_quick_start: there is no %list% in "%root%" 1>&2
  exit /b 1
)
"%venv_python%" -c "import shutil, sys; sys.exit(shutil.disk_usage(sys.prefix).free < 10**10)" || echo less than 10 GB are free here: enough without CUDA (3 GB), not for Linux's PyTorch 1>&2
echo installing %list% (several minutes the first time)
"%venv_python%" -m pip install --disable-pip-version-check -r "%root%%list%" || (
  echo train_quick_start: installing failed, see above. No connection: pip needs its package index this once. No space: free some. No matching version: PyTorch needs a 64-bit Python that is not brand new. Then try again; what is installed already is kept 1>&2
  exit /b 1
)
copy /y "%root%%list%" "%stamp%" >nul
exit /b

:show_next
set "sample=%root%data\sample\food-101"
for /f "usebackq delims=" %%l in ("%sample%\meta\test.txt") do (
  set "picture=%%l"
  goto ask
)
:ask
echo.
echo What the model sees on one picture of the test set:
"%venv_python%" "%root%backend\train_model.py" --predict "%sample%\images\%picture%.jpg" || exit /b
echo.
echo Made: the model with its report.html in ml-models\, the plates in data\sample\, the run in
echo checkpoints\ and mlflow.db. The plates are drawn: the model shows that everything works, not what
echo is on your table. Next:
echo   train_quick_start.bat food101
echo   .venv\Scripts\mlflow ui --backend-store-uri sqlite:///mlflow.db
echo   cd backend ^&^& ..\.venv\Scripts\uvicorn app.main:app
echo They train on Food-101 (101 real dishes), compare runs on http://127.0.0.1:5000, and let you try
echo the model on http://127.0.0.1:8000.
exit /b 0
